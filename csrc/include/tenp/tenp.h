// SPDX-License-Identifier: Apache-2.0
#pragma once

// Everything public, in the order in which a layer uses it.

#include "tenp/activation_stats.h"
#include "tenp/device.h"
#include "tenp/direction_change.h"
#include "tenp/error.h"
#include "tenp/expert_activations.h"
#include "tenp/expert_gemm.h"
#include "tenp/expert_layout.h"
#include "tenp/expert_statistics.h"
#include "tenp/neuron_contribution.h"
#include "tenp/routing.h"
#include "tenp/second_moment.h"
#include "tenp/tensor.h"
#include "tenp/threads.h"
#include "tenp/version.h"
