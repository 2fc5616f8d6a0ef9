"""Plain torch versions of every family: what the tests compare with and the documentation explains by."""
