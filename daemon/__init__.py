"""The service: from a drop to a version that everyone sees. Internal to mainstem, whatever its name says, except
trainers.py.
"""
