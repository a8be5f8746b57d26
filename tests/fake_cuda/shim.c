/* Preloaded before torch's CUDA build on a machine without a GPU. Its soname is libcuda.so.1, so that torch, which opens
 * the driver by that name to ask whether a device has a context, finds this file instead of the driver. */

static signed char devices = 0;

/* machine.py: many devices during backward, for which autograd starts its threads; none otherwise, as nodes of the graph
 * would ask a device that exists for its current stream. */
void fake_cuda_set_devices(int count) { devices = (signed char)count; }

/* c10::cuda::device_count() and c10::cuda::device_count_ensure_non_zero() */
signed char _ZN3c104cuda12device_countEv(void) { return devices; }
signed char _ZN3c104cuda26device_count_ensure_non_zeroEv(void) { return devices; }

/* No device has a context, so that autograd synchronises no streams when backward ends. */
int cuDevicePrimaryCtxGetState(int device, unsigned *flags, int *active) {
  (void)device;
  *flags = 0;
  *active = 0;
  return 0;
}
