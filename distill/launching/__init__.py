"""Starting ranks on many hosts: who is there, what of the user's environment goes along, and how it is quoted."""
