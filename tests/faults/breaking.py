def prepare(*_):
    pass
