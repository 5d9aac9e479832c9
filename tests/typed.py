"""How T5X_LIKE_TYPED=1 checks calls: an int is a float, as type checkers have it (PEP 484)."""

from beartype import BeartypeConf, beartype

check = beartype(conf=BeartypeConf(is_pep484_tower=True))
