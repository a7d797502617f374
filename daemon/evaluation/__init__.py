"""Is a version any good?

    scores.py     what an evaluator's output says
    rules.py      what the rules of `[evaluate] require` make of scores
    evaluator.py  runs the evaluator on a folder
    scoring.py    scores of weights, each taken once
    figures.py    the field's figures, from scores alone

The evaluator is the operator's own program: nothing here knows what it measures, and where it fails, that is no fault
of an expert.
"""
