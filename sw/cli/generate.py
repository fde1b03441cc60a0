"""The SystemVerilog of a configuration.

    systole generate [--rows R --cols C ... | --config F.toml] -o FOLDER

The command is the generator's own, ``python -m hw.generate``.
"""

from __future__ import annotations

from systole.hw.generate import app

(_command,) = app.registered_commands
main = _command.callback
