"""The command line of data.py."""

import pytest

from tools import data_commands
from tools.convert import FORMATS


def test_every_command_explains_its_flags(capsys):
    """A % that argparse takes for a format makes --help crash, and only --help."""
    for command in ("toy", "convert", "check", "select"):
        with pytest.raises(SystemExit) as end:
            data_commands.parse_arguments([command, "--help"])
        text = capsys.readouterr().out
        assert end.value.code == 0 and "usage: data.py" in text
        if command == "convert":
            assert all(name in text for name in FORMATS)
