"""Who is asked for a text, behind one protocol: a server, a model of this process, a program. See `opd.judges.base`."""
