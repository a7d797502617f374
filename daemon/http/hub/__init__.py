"""The protocol of the Hugging Face Hub over one home, for its own clients: what is published is read as models of the
namespace `mainstem`, and experts are pushed to it.

    repos.py        which version, and which of its files, a repository and a revision mean
    reading.py      what is read: a model, its files, its revisions
    pushing.py      what is sent: a repository, its files, a commit
    commit_body.py  the body of a commit, read as it comes
"""

from collections.abc import Callable

from starlette.routing import Route

from daemon.arrivals.uploads import Uploads
from daemon.http.files import Published
from daemon.http.hub.pushing import HubPushing, pushing_routes
from daemon.http.hub.reading import reading_routes
from daemon.http.hub.repos import Repos


def hub_routes(published: Published, uploads: Uploads | None, ready: Callable[[], str | None]) -> list[Route]:
    """All addresses, for the end of a list: the last ones take what nothing else did. Without `uploads` nothing is
    pushed.
    """
    if uploads is None:
        return reading_routes(published)
    pushing = HubPushing(uploads, ready, Repos(published))
    return [*pushing_routes(pushing), *reading_routes(published, pushing.pushed)]


__all__ = ["hub_routes"]
