"""What private tokens cost in money, on published price lists, which are data in prices.json with their dates."""

import json
from pathlib import Path
from typing import NamedTuple

from jax_entropy.errors import UserError, nearest
from jax_entropy.private.engine.engine import Account

_FILE = Path(__file__).with_name("prices.json")


class PriceList(NamedTuple):
    """US dollars for a gigabyte that leaves a data center, and for an hour of a core.

    checked: when and where each number was looked up again, and what could not be confirmed.
    """

    name: str
    date: str
    gigabyte: float
    core_hour: float
    source: str
    checked: str


def read_prices() -> dict[str, PriceList]:
    """The lists that came with the package, by their short names."""
    return {name: PriceList(**fields) for name, fields in json.loads(_FILE.read_text()).items()}


def read_price(name: str) -> PriceList:
    """One of the lists.

    Raises:
      UserError: there is none of that name.
    """
    if name not in (lists := read_prices()):
        raise UserError(f"prices={name!r} is not known{nearest(name, list(lists))}")
    return lists[name]


def thousand_tokens(account: Account, tokens: int, price: PriceList, cores: int = 0) -> float:
    """Dollars for a thousand tokens of a program that reads or writes so many: all parties' bytes, and their computing.

    Args:
      cores: of the machine that computed for all parties; 0 leaves computing out.
    """
    gigabytes, core_hours = sum(account.bytes) / 1e9, cores * account.seconds / 3600
    return (gigabytes * price.gigabyte + core_hours * price.core_hour) * 1000 / tokens
