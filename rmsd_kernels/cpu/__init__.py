def why_not(tensor):
    return "not written yet"
