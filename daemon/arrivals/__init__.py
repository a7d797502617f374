"""An expert on its way in: from the inbox or an upload to a verdict, and to its place."""
