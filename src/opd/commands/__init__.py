"""The commands of `opd`: one file or folder per command. No other package of `opd` imports this one."""
