"""Accounts: how they add up, and what they are worth on a network."""

import pytest

from jax_entropy.errors import UserError
from jax_entropy.private.cost.account import Network, add, on_network, read_network, times
from jax_entropy.private.engine.engine import Account


def test_networks():
    assert read_network("100mbps,80ms") == read_network("wan") == Network(0.04, 1.25e7)
    assert read_network("1gbps,1ms") == read_network("lan")
    account = Account(2.0, (12_500_000, 25_000_000), (1, 1), 10)
    assert on_network(account, read_network("wan")) == pytest.approx(2.0 + 10 * 0.04 + 2.0)
    for text in ("moon", "100mbps", "0mbps,80ms", "100,80"):
        with pytest.raises(UserError, match="must be lan, wan, or like 100mbps,80ms"):
            read_network(text)


def test_accounts_add_up_party_by_party():
    account = Account(2.0, (3, 5), (1, 2), 10)
    assert add([account, account._replace(bytes=(1, 1))]) == Account(4.0, (4, 6), (2, 4), 20)
    assert times(account, 3) == add([account] * 3)
