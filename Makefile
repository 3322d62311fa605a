# The lab's commands. Each one sets up what is missing first, may be repeated, and says what it does.
# The work is done by provision/*.sh and python -m labkit, which Vagrant and CI use as well.

PROFILE ?= quick
PYTEST_ARGS ?=
ENTER := provision/enter.sh
# A recipe ends with make, also where make is killed.
ifneq ($(shell setpriv --pdeathsig TERM echo yes 2>/dev/null),)
.SHELLFLAGS := --pdeathsig TERM -- $(SHELL) -c
SHELL := setpriv
endif
PYTHON := .venv/bin/python

# What a user gives reaches the commands by the environment, as it stands: neither make nor a shell
# expands it on the way.
$(foreach name,PROFILE MAP COMMAND LAB_PORT,$(if $(filter undefined,$(origin $(name))),,\
	$(eval export override $(name) := $$(value $(name)))))

.DEFAULT_GOAL := help
.PHONY: help setup report report-archive test lint lab bench-kernel bench-sync bench-load bench-watch doctor list verdicts mutation soak soak-follow diagnose watch clean

help: ## show this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 22

setup: ## install what is missing: Debian packages, headers, the Python environment
	@provision/setup.sh
	@provision/go-libraries.sh

report: setup ## run every notebook on this kernel, write reports/index.html (PROFILE=quick or full)
	@$(ENTER) $(PYTHON) -m labkit report --profile "$$PROFILE"

report-archive: ## the report as one file, reports.tar.gz: index.html in it opens from disk
	@provision/report-archive.sh

test: setup ## every check and every test (PYTEST_ARGS=... for pytest); installs Chromium, QEMU and Vagrant for it
	@provision/browser-packages.sh
	@provision/vm-packages.sh vagrant vagrant-libvirt || \
	echo "lab: so the tests of what may go wrong with the VM are skipped" >&2
	@checks=0; provision/lint.sh || checks=1; \
	provision/test.sh $(PYTEST_ARGS) || exit $$?; \
	if [ $$checks != 0 ]; then echo "lab: the tests pass, but checks above failed" >&2; exit 1; fi

lint: setup ## the checks alone: ruff, mypy, import rules, workflow, notebooks
	@provision/lint.sh

lab: setup ## JupyterLab on 127.0.0.1, with a new token
	@provision/lab.sh

bench-kernel: setup ## the kernel room's figures against their bars; exit status 5 if one falls short
	@$(ENTER) $(PYTHON) -m labkit bench kernel --profile "$$PROFILE"

bench-sync: setup ## the strategies' own speed against its bars; exit status 5 if one falls short
	@$(ENTER) $(PYTHON) -m labkit bench sync --profile "$$PROFILE"

bench-load: setup ## what each command takes beside 10,000 maps, against its bars; exit status 0 if all hold
	@$(ENTER) $(PYTHON) -m labkit bench load --profile "$$PROFILE"

bench-watch: setup ## what watching adds to each update, against its bars and another tool's way; exit status 5 if one falls short
	@$(ENTER) $(PYTHON) -m labkit bench watch --profile "$$PROFILE"

doctor: setup ## what this kernel can do, by trying
	@$(ENTER) $(PYTHON) -m labkit doctor

list: setup ## every experiment, and whether this kernel can run it
	@$(ENTER) $(PYTHON) -m labkit list

verdicts: setup ## every claim of the article, judged by the runs here; exit status 5 if one has changed
	@$(ENTER) $(PYTHON) -m labkit verdicts

mutation: setup ## spoil the recorded runs: every statement must turn; exit status 0 if all do
	@$(PYTHON) -m labkit mutation

soak: setup ## the quick experiments again and again, quiet and under load; may be stopped and continued
	@$(ENTER) $(PYTHON) -m labkit soak

soak-follow: setup ## followers and a watch at 2 x 100,000 changes/s for 30 minutes: accounts exact, memory flat
	@$(ENTER) $(PYTHON) -m labkit soak-follow --profile full

diagnose: setup ## why somebody may see old values of a map: MAP=id, pin or name; without it, all maps
	@$(ENTER) $(PYTHON) -m labkit diagnose $${MAP:+"$$MAP"}

watch: setup ## MAP=id, pin or name: show the changes of a map of yours as they are made
	@$(ENTER) $(PYTHON) -m labkit watch "$$MAP"

# The VM with Debian's stock kernel (provision/vm.py).
.PHONY: vm-host vm-image vm-boot vm-ssh vm-test vm-report vm-clean vm-url vagrant-test

vm-host: setup
	@provision/vm-packages.sh

vm-image: vm-host ## build the VM image: Debian 12 with its own kernel, and the lab in it
	@provision/vm-image.sh

vm-boot: vm-host ## boot the VM, and keep it until Ctrl-C
	@$(PYTHON) -m provision.vm boot

vm-ssh: vm-host ## a shell, or COMMAND=..., in the VM; boots one for it where none runs
	@$(PYTHON) -m provision.vm ssh $${COMMAND:+"$$COMMAND"}

vm-test: vm-host ## the kernel's tests in the VM, and the experiments that need its hooks
	@$(PYTHON) -m provision.vm test

vm-report: vm-host ## the report in the VM, as .lab/vm/results/report (PROFILE=quick or full)
	@$(PYTHON) -m provision.vm report --profile "$$PROFILE"

vm-clean: setup ## remove the VM's image and results
	@$(PYTHON) -m provision.vm clean

vm-url: ## the address of JupyterLab in the VM that vagrant up made
	@vagrant ssh -c "LAB_PORT=$$(printf %q "$$LAB_PORT") /vagrant/provision/lab-service.sh --url" -- -q

vagrant-test: setup ## vagrant up with libvirt, to a notebook's finding through the forwarded port
	@provision/vagrant-test.sh

clean: ## remove what the lab left in the kernel, then everything it made in this folder
	@provision/clean.sh
