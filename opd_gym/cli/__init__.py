"""The command `opd-gym`: one module a command."""
