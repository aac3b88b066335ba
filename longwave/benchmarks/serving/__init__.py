"""Servers under load: any server that OpenAI's clients can ask, as its own clients find it."""
