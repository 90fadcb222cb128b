"""Policy x sites -> plan: what becomes of each site, as data, before anything is changed."""
