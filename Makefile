# `make run` runs the demo on real small models; `make test` passes everything that must pass.
# Both install and fetch what is missing. Build outputs, weights and tools stay in $(SARAI_CACHE).

SARAI_CACHE ?= $(HOME)/.cache/sarai
CARGO_TARGET_DIR ?= $(SARAI_CACHE)/target
export SARAI_CACHE CARGO_TARGET_DIR
export SARAI_MODELS = $(SARAI_CACHE)/models

# One profile for all: llama.cpp is built once.
CARGO_FLAGS = --release --locked

.PHONY: run test lint unit bench bench-memory bench-cage bench-gateway bench-failover bench-engine soak fuzz abilities test-transformers deps models demo-models sketches ollama clients build

run: build demo-models
	@exec $(CARGO_TARGET_DIR)/release/sarai serve --config config/demo.yaml

test: lint unit

lint: deps
	cargo fmt --all --check
	cargo clippy $(CARGO_FLAGS) --workspace --all-targets -- -D warnings
	RUSTDOCFLAGS="-D warnings" cargo doc $(CARGO_FLAGS) --workspace --no-deps --document-private-items

# Tests that wait for nearly all of their time: they have a process of their own, on one core, beside the others. Two that compute on
# the same cores would keep each other's threads waiting, far beyond twice the time: all tests about hosts in it took the others so much
# longer that nothing was won (905 s instead of 766).
WAITING = failures::a_connection_that_says_nothing_is_closed_after_a_while \
	memory::a_dry_run_refines_the_plan_once_the_server_is_idle_and_is_remembered \
	hosts::a_name_whose_addresses_change_is_followed_while_the_server_runs \
	hosts::the_one_that_loses_the_race_is_cancelled_at_the_host \
	hosts::a_managed_cluster_is_neither_queued_for_nor_asked_twice_and_the_worker_stands_behind_it \
	hosts::heartbeats_are_signs_of_life_and_not_tokens \
	hosts::hosts_come_and_go_while_the_server_runs_and_a_bad_file_changes_nothing \
	refusals::a_request_keeps_its_turn_at_a_full_host_while_the_worker_is_tried \
	resuming::who_should_go_on_and_hangs_gives_way_to_the_worker \
	resuming::a_place_is_waited_for_once \
	resuming::a_host_that_was_late_has_its_turn_again_when_the_worker_fails \
	sharing::a_model_is_asked_where_it_is_loaded \
	sharing::a_host_that_makes_no_vectors_is_left_alone_until_it_does \
	remote::every_fault_before_the_first_token_leads_to_the_fallback_with_its_reason \
	refusals::vectors_are_waited_for_once_and_refused_where_they_would_lack_something \
	refusals::a_host_recovers_without_traffic_by_a_token_and_not_by_its_list \
	refusals::a_host_whose_queue_of_connections_is_full_is_given_up_in_the_time_of_a_connection \
	hosts::a_stall_is_noticed_within_a_few_of_the_hosts_usual_gaps_also_after_a_restart \
	drill::with_a_second_host_that_speaks_openais_api_too_and_the_text_is_whole \
	refusals::a_host_that_hangs_when_it_is_looked_at_is_asked_all_the_same_and_waited_for_once \
	resuming::an_answer_without_an_end_is_given_up_and_the_worker_gives_another \
	drill::with_a_local_fallback_every_fault_is_answered_and_every_cut_stream_goes_on \
	drill::with_nobody_else_every_fault_is_an_honest_failure

# One test at a time: each starts real models, and two that compute on the same cores slow each other down.
unit: deps models sketches ollama clients
	cargo test $(CARGO_FLAGS) --workspace --no-run
	SARAI_SKETCHES=$(SARAI_CACHE)/sketches SARAI_OLLAMA=$$(scripts/build_ollama.sh) SARAI_PYTHON=$$(scripts/python_clients.sh) \
		SARAI_NODE_CLIENTS=$$(scripts/node_clients.sh) \
		RUST_TEST_THREADS=1 RUST_BACKTRACE=0 WAITING="$(WAITING)" scripts/run_tests.sh $(CARGO_FLAGS)

# Tokens/s and latency as ratios: the bare engine and Ollama asked directly, in the same run.
bench: build models ollama
	cargo build $(CARGO_FLAGS) -p sarai-llama --example bare_engine
	SARAI_OLLAMA=$$(scripts/build_ollama.sh) cargo bench --profile release --locked -p sarai --bench http

# Every model that is here and a small file of each architecture: plan, dry run and measure over a grid of settings.
bench-memory: build models sketches
	python3 scripts/bench_memory.py $(MEMORY) \
		$$(ls $(SARAI_MODELS)/*.gguf $(SARAI_CACHE)/sketches/*.gguf | grep -v -e mmproj -e bert -e embedding -e minilm)
	python3 scripts/bench_abilities.py $(CARGO_TARGET_DIR)/release/sarai $(SARAI_MODELS) $(SARAI_CACHE)/sketches $$(scripts/python_clients.sh)

# Three models in less memory than they ask for, beside Ollama and llama.cpp's router under the same limits.
# LLAMA_SERVER names the latter's binary; docs/memory.md says how to get one.
bench-cage: build models ollama
	SARAI_OLLAMA=$$(scripts/build_ollama.sh) python3 scripts/bench_cage.py $(CAGE)

# What passes through to a host, beside asking it directly, nginx as a plain proxy, and LiteLLM's.
bench-gateway: build
	env $$(scripts/gateway_peers.sh) cargo bench --profile release --locked -p sarai --bench gateway

# The engine beside llama.cpp's own server: alone, 1 to 16 streams, a long prompt entering, shared prefixes, several models at
# once, parking, cold start. `ENGINE="together park"` measures some of it only.
bench-engine: build models
	LLAMA_SERVER=$${LLAMA_SERVER:-$$(scripts/build_llama_server.sh)} SARAI_BINARY=$(CARGO_TARGET_DIR)/release/sarai \
		python3 scripts/bench_engine.py $(ENGINE)

# A real Ollama killed before, while and after it answers: time to the fallback, and back.
bench-failover: build models ollama
	SARAI_OLLAMA=$$(scripts/build_ollama.sh) python3 scripts/bench_failover.py $(CARGO_TARGET_DIR)/release/sarai

# Half an hour of everything at once: memory and descriptors stay as they are. `MINUTES=5` is shorter.
soak: build models sketches
	python3 scripts/soak.py $(CARGO_TARGET_DIR)/release/sarai

# Five minutes of broken pictures, sounds, schemas, grammars and tools against the real server. `FUZZ="--minutes 60 --seed 7"` goes on for longer.
fuzz: build models sketches
	$$(scripts/python_clients.sh) scripts/fuzz.py $(CARGO_TARGET_DIR)/release/sarai $(SARAI_CACHE)/sketches/sensing \
		$(SARAI_MODELS)/qwen2.5-coder-0.5b-instruct-q4_k_m.gguf $(FUZZ)

# The table of what each model does in each API, asked anew.
abilities: build models sketches
	python3 scripts/abilities.py $(CARGO_TARGET_DIR)/release/sarai > docs/abilities-table.new
	mv docs/abilities-table.new docs/abilities-table.md

# A tiny Qwen2.5-Omni by PyTorch behind sarai: images, sound and video in, speech out. Installs 1.8 GB; not part of `make test`.
test-transformers: build
	python=$$(scripts/transformers_env.sh) && LD_LIBRARY_PATH=$$($$python tests/transformers/native_libs.py) \
		$$python tests/transformers/test_transformers.py $(CARGO_TARGET_DIR)/release/sarai

deps:
	@scripts/install_deps.sh

models:
	@python3 scripts/fetch_models.py

demo-models:
	@python3 scripts/fetch_models.py --demo

# Small files of each architecture with random weights, and models that see and hear.
sketches: clients models
	@if ! cat scripts/sketch_models.py scripts/sensing_models.py scripts/ranking_model.py | cmp -s - $(SARAI_CACHE)/sketches/made-by; then \
		"$$(scripts/python_clients.sh)" scripts/sketch_models.py -o $(SARAI_CACHE)/sketches >/dev/null && \
		"$$(scripts/python_clients.sh)" scripts/sensing_models.py -o $(SARAI_CACHE)/sketches/sensing \
			--template-of $(SARAI_MODELS)/qwen2.5-coder-0.5b-instruct-q4_k_m.gguf && \
		mkdir -p $(SARAI_CACHE)/sketches/ranking && \
		"$$(scripts/python_clients.sh)" scripts/ranking_model.py $(SARAI_MODELS)/all-minilm-l6-v2-f16.gguf $(SARAI_CACHE)/sketches/ranking/minilm.gguf && \
		cat scripts/sketch_models.py scripts/sensing_models.py scripts/ranking_model.py > $(SARAI_CACHE)/sketches/made-by; fi

ollama: deps
	@scripts/build_ollama.sh >/dev/null

clients: deps
	@scripts/python_clients.sh >/dev/null
	@scripts/node_clients.sh >/dev/null

build: deps
	cargo build $(CARGO_FLAGS) -p sarai
