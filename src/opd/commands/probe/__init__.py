"""`opd probe`: which teacher and context point towards right responses? It trains nothing.

`measure.py` plans and measures, `subjects.py` has the teachers and contexts, `report.py` the result as text and JSON.
"""
