# What do greedy actions cost? Everything else is measured with them, and a policy that stands still in some state stands there for good.
# The policies of libero_suites.mk on the same official states, with actions sampled at 0.05, the temperature at which OPD collects.
#
#   make -f benchmarks/libero_greedy.mk                       after libero_suites.mk; by a rough count two hours on two cores
#   make -f benchmarks/libero_greedy.mk goal SEEDS="1 2" POLICIES=opd ZOO=teacher
#   make -f benchmarks/libero_greedy.mk report
include $(dir $(firstword $(MAKEFILE_LIST)))common.mk

SUITES ?= goal spatial object 10
SEEDS ?= 0 1 2
POLICIES ?= opd sft grpo
ZOO ?= student teacher
TRAINED = runs/libero_suites
.PHONY: $(SUITES)
all: $(SUITES)

$(RUNS)/10/%.json: EPISODES = 250

$(TRAINED)/%.json:
	$(MAKE) -f benchmarks/libero_suites.mk $@

# $(call both,SUITE,NAME,CHECKPOINT,GREEDY): sampled, and a copy of the greedy evaluation beside it
define both
$(1): $(RUNS)/$(1)/sampled/$(2).json $(RUNS)/$(1)/greedy/$(2).json
$(RUNS)/$(1)/greedy/$(2).json: | $(4)
	mkdir -p $$(@D) && cp $(4) $$@
$(RUNS)/$(1)/sampled/$(2).json: | $(4)
	opd-gym eval --env $(ENV_$(1)) --checkpoint $(3) $(call task_ids,$(1)) --episodes $$(EPISODES) --temperature 0.05 --no-progress -o $$@
endef

# $(call trained,SUITE,ALGORITHM,SEED)
trained = $(call both,$(1),$(2)_seed$(3),$(TRAINED)/$(1)/seed$(3)/$(2)/$(ENV_$(1))_1/policy,$(TRAINED)/$(1)/seed$(3)/$(2)/$(ENV_$(1))_1/evaluation.json)

$(foreach suite,$(SUITES),\
    $(foreach name,$(ZOO),$(eval $(call both,$(suite),$(name),libero-$(suite)-$(name),$(TRAINED)/$(suite)/$(name).json)))\
    $(foreach seed,$(SEEDS),$(foreach algo,$(POLICIES),$(eval $(call trained,$(suite),$(algo),$(seed))))))

# $(call labels,FILE,NAME)
labels = -l '*/greedy/$(1)*=$(2)' -l '*/sampled/$(1)*=$(2) at 0.05'
report:
	$(call reported,--title "Greedy actions on LIBERO" --reference OPD $(call labels,student,student) $(call labels,sft,SFT) \
	    $(call labels,grpo,GRPO) $(call labels,opd,OPD) $(call labels,teacher,teacher))
