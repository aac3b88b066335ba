"""The hot maths: a folder per op with its forms; its `FORMS` table names them, `choose` picks one with a reason.

A form is resolved once, when a model is built, never inside a loop. `reference` is the plain twin in high precision.
"""
