"""Prefect's servers of this workspace: started, kept in the background, guarded by a credential, watched."""
