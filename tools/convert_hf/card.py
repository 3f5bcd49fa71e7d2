def documents(run, step, *, kind, base_name, evaluations=()):
    return {}
