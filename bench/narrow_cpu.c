/* Shows a program a processor with AVX2 and nothing newer: no AVX-512, VNNI, bf16, fp16 or AMX.
 *
 * Preloaded, it asks Linux to fault the CPUID instruction (arch_prctl ARCH_SET_CPUID) and answers it
 * with those bits cleared. Whatever chooses its code by CPUID, as torch, oneDNN, OpenVINO,
 * onnxruntime, numpy and OpenBLAS do, then runs what it would run on such a processor, on this one:
 * numbers are that processor's, speed is nearly. glibc has chosen before this is loaded. x86-64
 * Linux only, on processors whose /proc/cpuinfo says cpuid_fault. Use narrow.sh, which compiles it.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>

#define ARCH_SET_CPUID 0x1012

static struct sigaction others; /* what the program installed for SIGSEGV */
static int (*libc_sigaction)(int, const struct sigaction *, struct sigaction *);

static int let_cpuid(unsigned long run) { return (int)syscall(SYS_arch_prctl, ARCH_SET_CPUID, run); }

static unsigned bits(const int *numbers) {
    unsigned mask = 0;
    for (; *numbers >= 0; numbers++) mask |= 1u << *numbers;
    return mask;
}

/* Intel's manual, volume 2, CPUID leaf 7. */
static const int LEAF7_EBX[] = {16, 17, 21, 26, 27, 28, 30, 31, -1}; /* AVX-512 F DQ IFMA PF ER CD BW VL */
static const int LEAF7_ECX[] = {1, 6, 11, 12, 14, -1};               /* VBMI VBMI2 VNNI BITALG VPOPCNTDQ */
static const int LEAF7_EDX[] = {2, 3, 8, 22, 23, 24, 25, -1};        /* 4VNNIW 4FMAPS VP2INT AMX FP16 */
static const int LEAF71_EAX[] = {4, 5, 21, 23, -1};                  /* AVX-VNNI AVX512-BF16 AMX-FP16 AVX-IFMA */
static const int LEAF71_EDX[] = {4, 5, 8, 10, 19, 21, -1};           /* AVX-VNNI-INT8 NE-CONVERT AMX AVX10 APX */

static void answer(greg_t *registers) {
    unsigned a = registers[REG_RAX], c = registers[REG_RCX], b, d, leaf = a, sub = c;
    let_cpuid(1);
    __asm__ volatile("cpuid" : "+a"(a), "=b"(b), "+c"(c), "=d"(d));
    let_cpuid(0);
    if (leaf == 7 && sub == 0) {
        b &= ~bits(LEAF7_EBX);
        c &= ~bits(LEAF7_ECX);
        d &= ~bits(LEAF7_EDX);
    } else if (leaf == 7 && sub == 1) {
        a &= ~bits(LEAF71_EAX);
        d &= ~bits(LEAF71_EDX);
    }
    registers[REG_RAX] = a, registers[REG_RBX] = b, registers[REG_RCX] = c, registers[REG_RDX] = d;
    registers[REG_RIP] += 2;
}

static void on_fault(int number, siginfo_t *info, void *context) {
    greg_t *registers = ((ucontext_t *)context)->uc_mcontext.gregs;
    const unsigned char *instruction = (const unsigned char *)registers[REG_RIP];
    /* A jump to a bad address faults too, and cannot be read: that is not CPUID's fault. */
    if (info->si_code == SI_KERNEL && instruction[0] == 0x0f && instruction[1] == 0xa2) {
        answer(registers);
    } else if (others.sa_flags & SA_SIGINFO) {
        others.sa_sigaction(number, info, context);
    } else if (others.sa_handler == SIG_DFL || others.sa_handler == SIG_IGN) {
        struct sigaction none = {.sa_handler = SIG_DFL};
        libc_sigaction(SIGSEGV, &none, NULL); /* the instruction runs again and ends the process */
    } else {
        others.sa_handler(number);
    }
}

int sigaction(int number, const struct sigaction *new, struct sigaction *old) {
    if (!libc_sigaction) libc_sigaction = dlsym(RTLD_NEXT, "sigaction");
    if (number != SIGSEGV) return libc_sigaction(number, new, old);
    if (old) *old = others;
    if (new) others = *new;
    return 0;
}

__attribute__((constructor)) static void start(void) {
    libc_sigaction = dlsym(RTLD_NEXT, "sigaction");
    struct sigaction action = {.sa_sigaction = on_fault, .sa_flags = SA_SIGINFO | SA_NODEFER};
    libc_sigaction(SIGSEGV, &action, NULL);
    if (let_cpuid(0)) fputs("narrow_cpu: CPUID cannot be made to fault here\n", stderr);
}
