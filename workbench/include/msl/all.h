#pragma once
#include "types.h"

#include "runtime.h"

#include "traits.h"

#include "limits.h"
#include "vector.h"

#include "math.h"

#include "common.h"
#include "integer.h"

#include "barrier.h"

#include "simdgroup.h"

#include "atomic.h"
#include "simdgroup_matrix.h"

#include "logging.h"

#include "entry.h"
