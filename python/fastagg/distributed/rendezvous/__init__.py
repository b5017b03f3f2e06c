"""How ranks find each other, agree on a call, and notice who is lost."""
