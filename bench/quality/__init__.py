"""Which method when: every method on real experts that are made here, from packages alone. See bench/README.md.

texts/, tasks.py              texts and classes
encoder.py, training.py       sentence encoders, their heads, their experts
vision.py                     readers of digits
places.py                     the demo's network
lora.py                       LoRA experts of both
cache.py                      files that several processes fill
experts.py, family.py         encoders as experts; a base, its experts and what scores them
scoring.py                    encoders, fast
folding.py, streams.py        a method over a stream of experts, through the product's driver
routing.py, learning.py       smile with its router; coefficients that are learned without labels
time_grid.py                  what the next expert starts from, and what is served
blocks.py, measuring.py       what is measured; all of it
findings.py, report.py, ...   docs/quality.md
"""
