"""`longwave bench`: measurements beside what is possible, one file per kind."""

from longwave.cli.bench import compare, context, engine, models, ops, serving
from longwave.cli.parser import Group

VERBS = Group(
    "bench",
    "time models, ops or servers beside what is possible, the output checked first; compare two runs",
    "KIND",
    (models.INFERENCE, models.TRAINING, ops.VERB, context.VERB, engine.VERB, serving.VERB, compare.VERB),
)
