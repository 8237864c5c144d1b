"""The commands of `opd`, one file or folder each. No other room imports this one."""
