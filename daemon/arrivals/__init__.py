"""An expert on its way in, up to its place.

    inbox.py         what lies there, and what of it has come to rest
    inbox_folder.py  keeps an eye on the inbox's own folder
    receiving.py     one file that comes over HTTP
    pushes.py        what is pushed in commits, and when it is an expert
    uploads.py       experts that are sent, moved into the inbox when whole
    arrival.py       is it the only one in its folder, and was all of it written
    trained_from.py  the version that it was trained from
    admission.py     what its numbers must be like
    identity.py      which merged expert it is once more
    recording.py     as the registry is told of it
    attempts.py      how often it was tried in vain
    blame.py         whose fault an error was
    filing.py        moves it to archive/ or quarantine/
    duplicates.py    a duplicate's bytes are kept once
    copying.py       copies what others may still write to
    stuck.py         what to do about one that cannot be moved

Never deleted, never guessed at, and never able to stop the others.
"""
