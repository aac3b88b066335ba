"""An OpenAI-compatible server over the engine: HTTP, text and limits here, tokens there (`longwave/engine/`)."""
