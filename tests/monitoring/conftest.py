from __future__ import annotations

import pytest

from monitored_release import Released, make_release


@pytest.fixture(scope="session")
def released(tmp_path_factory: pytest.TempPathFactory) -> Released:
    return make_release(tmp_path_factory.mktemp("monitored"))
