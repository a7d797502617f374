"""Texts and their labels, from data that packages bring.

sampling.py   a balanced choice, and a training and a test part that have nothing in common
words.py      what a word tells: its language, its sound, its form, whether it is spelled right
names.py      people, cities, things in many languages (CLDR)
passages.py   verses, diagnoses, lines of code, compounds
"""
