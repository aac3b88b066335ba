"""The type checker of the tests: beartype, to which an integer is a float as it is to Python's own typing."""

from beartype import BeartypeConf, beartype

check = beartype(conf=BeartypeConf(is_pep484_tower=True))
