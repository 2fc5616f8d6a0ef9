"""One arbitrary change anywhere in nested dicts and lists, as hypothesis draws it."""

import torch
from hypothesis import strategies as st

VALUES = st.one_of(
    st.none(), st.integers(-2, 200), st.floats(), st.text(max_size=3), st.just(torch.zeros(3)), st.just({}), st.just([])
)


def spoil_anywhere(data, nested) -> None:
    """Deletes or replaces one entry at any depth."""
    here = nested
    while True:
        key = data.draw(st.sampled_from(list(here) if isinstance(here, dict) else range(len(here))))
        deeper = isinstance(here[key], (dict, list)) and len(here[key])
        if not deeper or data.draw(st.integers(0, 3)) == 0:
            break
        here = here[key]
    if data.draw(st.booleans()):
        del here[key]
    else:
        here[key] = data.draw(VALUES)
