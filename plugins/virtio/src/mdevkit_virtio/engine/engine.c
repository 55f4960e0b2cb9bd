/* One translation unit, so that the path of a frame inlines without link-time optimisation. */
#include "guard.c"
#include "ring.c"
#include "net.c"
#include "loop.c"
