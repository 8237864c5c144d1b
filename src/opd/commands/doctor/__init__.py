"""`opd doctor`: will this teacher teach this student? Runs before training and changes no weight.

`examine.py` runs all checks. `findings.py` holds what they return, `subject.py` what they examine; each other file
holds checks of one kind.
"""
