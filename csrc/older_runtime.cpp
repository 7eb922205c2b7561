// Linked into `_C`, so that it loads beside an older glibc and libstdc++ than those of its compiler: a manylinux_2_28
// wheel may use no symbol that is newer than glibc 2.28 and GCC 8. Inline functions of newer headers use the four
// symbols below. `_C` has them itself, and they are hidden, so nothing else takes them from here.
#include <exception>
#include <new>

#ifdef __GLIBCXX__
#define ULR_OWN(symbol) __asm__(symbol) __attribute__((visibility("hidden")))

using std::exception_ptr;

// Of glibc 2.32: whether the process has one thread, so that reference counts need no atomic operation. 0 is always
// safe.
extern char single_threaded ULR_OWN("__libc_single_threaded");
char single_threaded = 0;

// Of GCC 11.
void throw_bad_array_new_length() ULR_OWN("_ZSt28__throw_bad_array_new_lengthv");
void throw_bad_array_new_length() { throw std::bad_array_new_length(); }

// GCC 11 made the copy constructor and the destructor of exception_ptr inline. The runtime still exports both, and they
// count references.
void copy_by_runtime(void* copy,
                     const exception_ptr* original) __asm__("_ZNSt15__exception_ptr13exception_ptrC1ERKS0_");
void destroy_by_runtime(void* copy) __asm__("_ZNSt15__exception_ptr13exception_ptrD1Ev");

void add_reference(exception_ptr*) ULR_OWN("_ZNSt15__exception_ptr13exception_ptr9_M_addrefEv");
void add_reference(exception_ptr* pointer) {
    void* copy;  // it is never destroyed, so its reference stays counted
    static_assert(sizeof copy == sizeof *pointer);
    copy_by_runtime(&copy, pointer);
}

void release_reference(exception_ptr*) ULR_OWN("_ZNSt15__exception_ptr13exception_ptr10_M_releaseEv");
void release_reference(exception_ptr* pointer) {
    destroy_by_runtime(pointer);
    *reinterpret_cast<void**>(pointer) = nullptr;
}
#endif
