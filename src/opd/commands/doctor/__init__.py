"""`opd doctor`: will this teacher teach this student? Looks before any training, and changes no weight.

`examine.py` puts the checks together; each other file holds checks of one kind, and `findings.py` what they return.
"""
