#pragma once
// Stands in for Apple's SDK: what the Metal headers in the mlx wheel name.
#ifdef __cplusplus
extern "C" {
#endif
typedef const void* CFTypeRef;
typedef const struct __CFString* CFStringRef;
typedef const struct __CFAllocator* CFAllocatorRef;
typedef double CFAbsoluteTime;
typedef double CFTimeInterval;
typedef long CFIndex;
CFTypeRef CFRetain(CFTypeRef);
void CFRelease(CFTypeRef);
#ifdef __cplusplus
}
#endif
