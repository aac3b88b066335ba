"""Recall tasks made with a seed: something stands in a long text, and the end of the text asks for it.

One set of generators serves training (`documents.py`, behind `longwave prepare recall`) and evaluation
(`longwave.evaluation.recall`). The families are those of RULER (Hsieh et al. 2024, arXiv 2404.06654), in words of our
own, with two that small models learn from: pairs of a key and a value, and a line to copy.

- A sample of length N has N tokens: those that the tokenizer puts before a text, the prompt, the answer with its line
  end, and the tokens that end a text. The joined text is what is counted (`fitting.py`), never its pieces.
- A sample is a function of its key alone (`longwave.draws`), so that every machine makes the same.
"""

from longwave.data.recall.families import FAMILIES, RULER, Family, family_of
from longwave.data.recall.fitting import Sample, sample
from longwave.data.recall.questions import Question, read_questions

__all__ = ["FAMILIES", "RULER", "Family", "Question", "Sample", "family_of", "read_questions", "sample"]
