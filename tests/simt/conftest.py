import pytest

import emulated


@pytest.fixture(scope="session")
def libraries():
    """The plain and the race library; asan runs in processes of its own."""
    emulated.build()
    return {mode: emulated.load(emulated.library_path(mode)) for mode in ("plain", "race")}


@pytest.fixture(autouse=True)
def default_settings():
    with emulated.settings():
        yield
