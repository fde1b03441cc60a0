"""The environment of all tests: the same everywhere, whoever runs them."""

import os

from hypothesis import HealthCheck, settings

# rich and typer draw as they please for terminals and continuous integration.
for _name in (
    *("GITHUB_ACTIONS", "FORCE_COLOR", "NO_COLOR", "PY_COLORS", "CLICOLOR_FORCE"),
    *("TTY_COMPATIBLE", "TTY_INTERACTIVE", "TERMINAL_WIDTH"),
    "PYTHONUNBUFFERED",  # Nor may what a simulator prints depend on it.
):
    os.environ.pop(_name, None)
os.environ |= {"COLUMNS": "100", "LINES": "40", "TERM": "dumb"}

# The same examples in every run, and no measured time decides.
settings.register_profile(
    "tests",
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("tests")
