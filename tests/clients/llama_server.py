"""llama.cpp's own server, from its package on PyPI: `llama_server.py MODEL PORT`."""

import signal, sys
import xllamacpp
params = xllamacpp.CommonParams()
params.model.path, params.hostnames, params.port = sys.argv[1], ["127.0.0.1"], int(sys.argv[2])
params.n_ctx = 1024
server = xllamacpp.Server(params)
print(server.listening_address, flush=True)
signal.pause()
