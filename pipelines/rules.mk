# One pattern rule a stage. Each target is the record that its stage writes last, so an interrupted `make` goes on where it
# stopped. A stage that finds itself up to date (a change of [export] leaves training alone) only touches its record.
#
#   make NAME             everything for pipelines/NAME.toml        make -n NAME    the plan
#   make NAME@VARIANT     a variant of that recipe                  make clean-NAME
#   make NAME BUILD=tryout SETTINGS='--set train.epochs=1'          another folder, other settings

BUILD ?= build
SETTINGS ?=
RECIPES := $(patsubst pipelines/%.toml,%,$(wildcard pipelines/*.toml))
PIPELINES := $(RECIPES) $(foreach goal,$(MAKECMDGOALS),$(if $(findstring @,$(goal)),$(filter-out clean-%,$(goal))))
# Two pipelines at once would draw over each other's bars.
QUIET = $(if $(findstring -j,$(MAKEFLAGS)),--no-progress)

.PHONY: recipes $(PIPELINES)
.SECONDEXPANSION:

recipes: | $(STAMP) ## List the recipes; each is a target
	@$(RUN) recipes

$(PIPELINES): %: $(BUILD)/%/report.html

$(PIPELINES:%=$(BUILD)/%/dense/record.json): $(BUILD)/%/dense/record.json: pipelines/$$(firstword $$(subst @, ,$$*)).toml | $(STAMP)
	$(RUN) train '$*' --out '$(BUILD)/$*' $(SETTINGS) $(QUIET)

$(PIPELINES:%=$(BUILD)/%/relieved/record.json): $(BUILD)/%/relieved/record.json: $(BUILD)/%/dense/record.json
	$(RUN) relieve '$(BUILD)/$*' $(QUIET)

$(PIPELINES:%=$(BUILD)/%/quantised/record.json): $(BUILD)/%/quantised/record.json: $(BUILD)/%/relieved/record.json
	$(RUN) quantise '$(BUILD)/$*' $(QUIET)

$(PIPELINES:%=$(BUILD)/%/artifacts/record.json): $(BUILD)/%/artifacts/record.json: $(BUILD)/%/quantised/record.json
	$(RUN) export '$(BUILD)/$*' $(QUIET)

$(PIPELINES:%=$(BUILD)/%/validation.json): $(BUILD)/%/validation.json: $(BUILD)/%/artifacts/record.json
	$(RUN) validate '$(BUILD)/$*' $(QUIET)

# After the validation, because that measures times, which an audit beside it would spoil.
$(PIPELINES:%=$(BUILD)/%/audit.json): $(BUILD)/%/audit.json: $(BUILD)/%/artifacts/record.json | $(BUILD)/%/validation.json
	$(RUN) audit '$(BUILD)/$*'

$(PIPELINES:%=$(BUILD)/%/report.html): $(BUILD)/%/report.html: $(BUILD)/%/validation.json $(BUILD)/%/audit.json
	$(RUN) report '$(BUILD)/$*'

clean-%: ## Remove the build folder of one recipe
	rm -rf '$(BUILD)/$*'
