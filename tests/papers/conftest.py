"""What the tests of several papers share."""

import pytest


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """One repository for all tests: its data are rendered once, and equal trainings found again."""
    root = tmp_path_factory.mktemp("repository")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WSOLNB_ROOT", str(root))
        yield root
