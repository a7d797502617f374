"""`mainstem zipit`: whole models zipped by their features on calibration data, apart from any home.

    calibration.py  the models running, and the data: a person's own Python file, or transformers
    sequential.py   the graph of an nn.Sequential
    families.py     the graph of transformers, from the names of tensors
    features.py     what goes on in running models, gathered
    zipping.py      two models and more, zipped one after the other
    writing.py      the folder that comes of it

Zipping is no method of a head: it needs data and the model's graph, and it knows no base. The algebra is in
projector/zipping/.
"""
