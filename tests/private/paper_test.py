"""The paper's tables from the architecture alone: 0.5 % in communication, 3 % in latency."""

import pytest

from jax_entropy.architecture import architecture
from jax_entropy.errors import UserError
from jax_entropy.private.cost.paper import paper_cost

NAMES = ("SM+LN+G", "SM+LN+R", "SM+ScFuFFN", "EReg(SM(t)+ScFuFFN)")
# (layers, context, vocabulary): gigabytes and minutes of the four architectures
TABLES = {
    (12, 128, 50_000): ((25.32, 8.21), (9.44, 6.06), (6.43, 4.76), (6.43, 4.76)),  # Table 3
    (12, 256, 50_000): ((58.51, 16.57), (26.73, 12.59), (20.72, 10.45), (20.72, 10.45)),  # Table 7
    (12, 512, 16_384): ((145.24, 30.74), (81.71, 23.54), (69.68, 19.44), (69.68, 19.44)),  # Table 4
    (18, 128, 50_000): ((37.17, 10.77), (13.34, 8.04), (8.83, 6.07), (8.83, 6.07)),  # Table 8
}
ROWS = [(size, name, row) for size, rows in TABLES.items() for name, row in zip(NAMES, rows, strict=True)]


@pytest.mark.parametrize(("size", "name", "row"), ROWS)
def test_the_papers_tables(size, name, row):
    L, T, V = size
    cost = paper_cost(architecture(name, num_layers=L, context_length=T, vocab_size=V))
    assert cost.gigabytes == pytest.approx(row[0], rel=0.005)
    assert cost.minutes == pytest.approx(row[1], rel=0.03)


@pytest.mark.parametrize(
    "change",
    [
        dict(model_dim=512, num_heads=8),
        dict(norm="rms"),
        dict(activation="leaky_relu"),
        dict(conv_width=4),
        dict(value_embedding=True),
        dict(num_slots=8),
    ],
)
def test_what_the_paper_does_not_cover_is_said(change):
    with pytest.raises(UserError, match="the paper's tables are for"):
        paper_cost(architecture("SM+LN+G", **change))
    assert paper_cost(architecture("SM+LN+G", activation="gelu_tanh")) == paper_cost(architecture("SM+LN+G"))
