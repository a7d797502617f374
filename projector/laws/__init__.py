"""The laws that every merging method obeys, for ours and for third parties' alike."""
