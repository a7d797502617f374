"""The maths and the tensor streams.

CONTRIBUTING.md says which modules are public; all others are internal, whatever their names say.
"""
