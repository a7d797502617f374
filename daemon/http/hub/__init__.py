"""The protocol of the Hugging Face Hub over one home, for its own clients: what is published is read as models of the
namespace `mainstem`, and experts are pushed to it.

    repos.py      which version, and which of its files, a repository and a revision mean
    reading.py    what is read: a model, its files, its revisions
"""

from daemon.http.hub.reading import reading_routes

__all__ = ["reading_routes"]
